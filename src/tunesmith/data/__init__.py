"""From files to token ids and a mask: read, check, render, pack."""
