"""The web page. Thin: it calls what the commands call, and keeps only conversations of its own."""
