"""What breaks when things break? `make chaos`: real processes on hosts of their own, hurt on purpose under load."""
