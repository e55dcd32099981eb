"""Will Dynamo run on this machine, and with what? The command `dynamo doctor`.

`ask` learns facts, `judge` turns facts and the support matrix (`matrix.toml`) into verdicts and asks nobody, `report`
shows them.
"""
