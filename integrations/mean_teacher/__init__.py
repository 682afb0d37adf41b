"""Mean teacher: few labels, many images, and agreement with the student's average."""
