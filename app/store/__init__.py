"""Questions asked of the database: each function takes a Connection, returns plain records and never commits."""
