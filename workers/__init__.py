"""The only place where rows and tensors meet: jobs, stages and the bridge between them."""
