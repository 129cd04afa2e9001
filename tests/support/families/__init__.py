"""One module per golden family; each registers its checks with golden_support.family."""
