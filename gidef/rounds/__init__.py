"""One round of federated training, and what the server does with its mean update."""
