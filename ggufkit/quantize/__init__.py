"""Which bits each tensor gets: file types and their rules."""
