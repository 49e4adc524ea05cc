"""Words that both halves of the split share. Imports nothing but the standard library."""
