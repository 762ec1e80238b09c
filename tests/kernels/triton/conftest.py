def pytest_configure(config):
    config.addinivalue_line("markers", "real_size: works on memory that is reserved and never filled")
