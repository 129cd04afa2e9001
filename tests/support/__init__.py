"""What the tests share: tiny runs, oracles, files made by hand, and how commands are started."""
