"""What tests need beside the product: waiting, looking for what was left behind, and a link that can be cut."""
