"""Pictures, tables and pages: of what a run left, and of rows as training sees them. Needs no torch and no model."""
