"""From files to batches: read, template and mask, tokenise and cache, pack, collate."""
