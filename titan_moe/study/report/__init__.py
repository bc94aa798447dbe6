"""What a study found: tables, figures, sentences and pages."""
