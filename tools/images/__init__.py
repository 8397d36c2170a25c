"""How tools/test-images makes images."""
