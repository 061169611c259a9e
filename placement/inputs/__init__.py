"""What is given: models, machines and workloads, from files and from the machine itself."""
