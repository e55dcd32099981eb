"""What makes an engine a worker: the contract (`contract`), and all that serves it (`serving`)."""
