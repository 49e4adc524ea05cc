"""Tool calling: how a model is told of functions, held to their schemas, and understood when it calls one.

`values` is what a chat offers, `format` how a model writes a call, and the rest are functions of these two: `grammar`
(what it may write), `text_form` (the same for text beside it), `parser` (what it wrote), `words` (how a model is told
whose template knows no tools), `codec` (the wire). `calling` puts them together for the model that is served.
"""
