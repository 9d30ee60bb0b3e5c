"""Pure tensor mathematics and statistics: no model, file or setting is touched here."""
