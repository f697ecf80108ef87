"""What `mer bench` runs, and the workloads it runs on."""
