"""The values that modules keep from call to call besides parameters: found, compared and restored."""
