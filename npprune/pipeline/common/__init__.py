"""What every stage needs: the device, the network and its images, events, the run's result."""
