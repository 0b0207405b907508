"""What a run makes of the machines that it is started on: device, profile, experiment."""
