//! The tables of the catalogue, and the steps from each older version to this one.

/// Version of the tables after all steps.
pub(super) const VERSION: i64 = 5;

/// Tables of version 3.
pub(super) const SCHEMA: &str = "
CREATE TABLE meta (key TEXT PRIMARY KEY, value INTEGER NOT NULL) STRICT;
CREATE TABLE hosts (
  host BLOB PRIMARY KEY, name TEXT NOT NULL, enrolled INTEGER NOT NULL,
  removed INTEGER NOT NULL) STRICT;
CREATE TABLE tokens (
  hash BLOB PRIMARY KEY, host_name TEXT NOT NULL, expires INTEGER NOT NULL) STRICT;
CREATE TABLE volumes (
  volume BLOB PRIMARY KEY, name TEXT NOT NULL UNIQUE, host BLOB NOT NULL,
  size INTEGER NOT NULL, logical INTEGER NOT NULL, physical INTEGER NOT NULL,
  point_interval_ms INTEGER NOT NULL, unprotected INTEGER NOT NULL,
  points_upto BLOB NOT NULL, policy TEXT NOT NULL DEFAULT '') STRICT;
CREATE TABLE points (
  point INTEGER PRIMARY KEY AUTOINCREMENT, volume BLOB NOT NULL, lsn BLOB NOT NULL,
  time INTEGER NOT NULL, kind TEXT NOT NULL, name TEXT NOT NULL, marker BLOB NOT NULL,
  pinned INTEGER NOT NULL, recorded INTEGER NOT NULL, UNIQUE (volume, lsn)) STRICT;
CREATE TABLE views (
  view BLOB PRIMARY KEY, volume BLOB NOT NULL, lsn BLOB NOT NULL, opened INTEGER NOT NULL,
  open_micros INTEGER NOT NULL, closed INTEGER, note TEXT, time INTEGER, point INTEGER,
  size INTEGER, export TEXT, read_only INTEGER, scratch_bytes INTEGER, tls_address TEXT,
  device TEXT, device_lost TEXT, image TEXT, flatten_to TEXT, flatten_rate INTEGER,
  flatten_force INTEGER, flatten_code INTEGER, flatten_why TEXT) STRICT;
CREATE TABLE events (
  event INTEGER PRIMARY KEY AUTOINCREMENT, time INTEGER NOT NULL, code INTEGER NOT NULL,
  volume TEXT, text TEXT NOT NULL) STRICT;
";

/// From version 1 to 2: volumes have a retention policy.
pub(super) const TO_VERSION_2: &str =
    "ALTER TABLE volumes ADD COLUMN policy TEXT NOT NULL DEFAULT '';";

/// From version 2 to 3: views are opened again. Those of before have ended with their daemon.
pub(super) const TO_VERSION_3: &str = "
ALTER TABLE views ADD COLUMN time INTEGER;
ALTER TABLE views ADD COLUMN point INTEGER;
ALTER TABLE views ADD COLUMN size INTEGER;
ALTER TABLE views ADD COLUMN export TEXT;
ALTER TABLE views ADD COLUMN read_only INTEGER;
ALTER TABLE views ADD COLUMN scratch_bytes INTEGER;
ALTER TABLE views ADD COLUMN tls_address TEXT;
ALTER TABLE views ADD COLUMN device TEXT;
ALTER TABLE views ADD COLUMN device_lost TEXT;
ALTER TABLE views ADD COLUMN image TEXT;
ALTER TABLE views ADD COLUMN flatten_to TEXT;
ALTER TABLE views ADD COLUMN flatten_rate INTEGER;
ALTER TABLE views ADD COLUMN flatten_force INTEGER;
ALTER TABLE views ADD COLUMN flatten_code INTEGER;
ALTER TABLE views ADD COLUMN flatten_why TEXT;
";

/// From version 4 to 5: something can be said of a point. It may come before the point does.
pub(super) const TO_VERSION_5: &str = "
CREATE TABLE point_notes (
  number INTEGER PRIMARY KEY AUTOINCREMENT, volume BLOB NOT NULL, lsn BLOB NOT NULL,
  problem TEXT NOT NULL) STRICT;
CREATE INDEX point_notes_at ON point_notes (volume, lsn);
";
