"""The SpaFL federated simulator: algorithms, data, round loop, cost accounting and reports."""
