"""Where should a request go, asked by a program that is not ours? The router's parts as programs of their own."""
