"""The selection service as a program; what it does is in `dynamo.services.selection`."""
