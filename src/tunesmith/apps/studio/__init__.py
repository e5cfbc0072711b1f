"""The web page. Thin: it calls what the commands call, and keeps only conversations of its own."""

PASSWORD = "TUNESMITH_PASSWORD"  # the environment variable that holds it
