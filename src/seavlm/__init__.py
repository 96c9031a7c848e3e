"""seavlm."""
