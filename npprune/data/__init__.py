"""Images and labels: sources by name, the model's preprocessing, batches in a fixed order."""
