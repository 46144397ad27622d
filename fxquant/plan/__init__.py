"""Recipe and graph: what runs in integers, with what spec, and why not."""
