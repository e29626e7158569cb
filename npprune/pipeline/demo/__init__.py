"""The demo: the digits' network, trained here, and the whole line on it (`stage.run_demo`)."""
