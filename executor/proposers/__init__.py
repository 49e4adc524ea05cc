"""Who guesses the tokens behind the known ones, for speculative decoding."""
