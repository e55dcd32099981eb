"""The slot tracker as a program; what it does is in `dynamo.services.slots`."""
