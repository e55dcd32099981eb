"""Functions that learn one fact each. They may raise and may hang: `dynamo.doctor.gather` minds that."""
