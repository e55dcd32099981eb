"""The stand-alone indexer as a program; what it does is in `dynamo.services.indexer`."""
