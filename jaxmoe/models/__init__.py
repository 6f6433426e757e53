"""Decoder-only transformers: embed, blocks of attention and a feed-forward part, norm, head."""
