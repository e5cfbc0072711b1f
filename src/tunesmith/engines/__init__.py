"""Engines turn token ids into token ids: llama.cpp, and transformers as the reference."""
