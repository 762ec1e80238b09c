"""The tests of the folders below import the models and helpers of this one by name: pytest puts it on the path."""
