"""The methods: one file each, found by name (discovery.py); contract.py says what one is."""
