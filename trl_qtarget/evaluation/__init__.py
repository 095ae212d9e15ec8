"""What `trl-qtarget eval` is made of: problems and verifiers, models and their samples, the report."""
