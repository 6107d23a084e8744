"""What inputs must satisfy before they are merged."""
