"""Starting a training in several processes, on this machine, on many or on SageMaker."""
