"""Pagewire, installed: the `pagewire` command. The server itself is in the five packages that the launcher finds."""
