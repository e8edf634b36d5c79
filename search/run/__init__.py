"""`run`: open the study, have its budget done, finale, summary."""
