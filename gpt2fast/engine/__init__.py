"""The decode engine: sequences that join and leave a running batch, one step after the other."""
