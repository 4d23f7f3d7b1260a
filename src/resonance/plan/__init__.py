"""What fits the hardware: from recordings, model and device to settings, memory, time and cost. Free of torch."""
