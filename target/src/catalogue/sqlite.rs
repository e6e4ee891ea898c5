//! The catalogue in SQLite: write-ahead log, synchronous=FULL, one file.
//!
//! Places are stored as 16 big-endian bytes, so that SQLite orders them as we do.

mod failover;
mod schema;
#[cfg(test)]
mod tests;

use std::path::{Path, PathBuf};

use farshore_extent::{
    BlockSizes, Epoch, HostId, Lsn, MarkerId, PointId, PointKind, Problem, Seq, ViewId, VolumeId,
    VolumeName, VolumeSize, WallTime,
};
use rusqlite::{Connection, OptionalExtension, Row, params};

use super::{
    Age, Catalogue, CatalogueError, EventRow, FlattenRow, HostRow, NewPoint, PointRow,
    PointSummary, Scrub, ViewRow, VolumeRow, Wanted,
};

use schema::{SCHEMA, TO_VERSION_2, TO_VERSION_3, TO_VERSION_5, VERSION};

/// Events kept; the oldest go.
const MAX_EVENTS: i64 = 10_000;
/// Notes on points kept; the oldest go.
const MAX_NOTES: i64 = 10_000;

/// From version 3 to 4: failovers and jobs.
const TO_VERSION_4: &str = failover::SCHEMA;

/// See the module.
pub struct SqliteCatalogue {
    db: Connection,
}

impl SqliteCatalogue {
    /// Opens the catalogue of `file`, and makes it when there is none.
    ///
    /// # Errors
    /// [`CatalogueError::Newer`] for one of a later release, or what SQLite says.
    pub fn open(file: &Path) -> Result<Self, CatalogueError> {
        let mut db = Connection::open(file)?;
        db.pragma_update(None, "journal_mode", "WAL")?;
        db.pragma_update(None, "synchronous", "FULL")?;
        db.pragma_update(None, "foreign_keys", true)?;
        let version: i64 = db.pragma_query_value(None, "user_version", |row| row.get(0))?;
        let steps: &[&str] = match version {
            0 => &[SCHEMA, TO_VERSION_4, TO_VERSION_5],
            1 => &[TO_VERSION_2, TO_VERSION_3, TO_VERSION_4, TO_VERSION_5],
            2 => &[TO_VERSION_3, TO_VERSION_4, TO_VERSION_5],
            3 => &[TO_VERSION_4, TO_VERSION_5],
            4 => &[TO_VERSION_5],
            VERSION => &[],
            newer => return Err(CatalogueError::Newer(newer)),
        };
        let change = db.transaction()?;
        steps.iter().try_for_each(|step| change.execute_batch(step))?;
        change.pragma_update(None, "user_version", VERSION)?;
        change.commit()?;
        Ok(Self { db })
    }
}

fn lsn_bytes(lsn: Lsn) -> [u8; 16] {
    ((u128::from(lsn.epoch.get()) << 64) | u128::from(lsn.seq.get())).to_be_bytes()
}

fn damaged(what: impl ToString) -> CatalogueError {
    CatalogueError::Damaged(what.to_string())
}

/// Signed for SQLite, which has no other integers.
fn signed(n: u64) -> Result<i64, CatalogueError> {
    i64::try_from(n).map_err(damaged)
}

/// Reads typed columns of a row; every impossible value is [`CatalogueError::Damaged`].
struct Columns<'a, 'b>(&'a Row<'b>);

impl Columns<'_, '_> {
    fn int(&self, name: &str) -> Result<i64, CatalogueError> {
        Ok(self.0.get(name)?)
    }
    fn unsigned(&self, name: &str) -> Result<u64, CatalogueError> {
        u64::try_from(self.int(name)?).map_err(damaged)
    }
    fn text(&self, name: &str) -> Result<String, CatalogueError> {
        Ok(self.0.get(name)?)
    }
    fn bytes<const N: usize>(&self, name: &str) -> Result<[u8; N], CatalogueError> {
        let bytes: Vec<u8> = self.0.get(name)?;
        bytes.try_into().map_err(|_| damaged(format!("length of {name}")))
    }
    fn lsn(&self, name: &str) -> Result<Lsn, CatalogueError> {
        let bytes: [u8; 16] = self.bytes(name)?;
        let (epoch, seq) = bytes.split_at(8);
        let number = |half: &[u8]| half.iter().fold(0u64, |n, b| (n << 8) | u64::from(*b));
        Ok(Lsn::new(Epoch::new(number(epoch)), Seq::new(number(seq))))
    }
    fn time(&self, name: &str) -> Result<WallTime, CatalogueError> {
        Ok(WallTime::from_nanos(self.int(name)?))
    }
    fn name(&self, name: &str) -> Result<VolumeName, CatalogueError> {
        VolumeName::new(&self.text(name)?).map_err(damaged)
    }
}

fn host_row(row: &Columns<'_, '_>) -> Result<HostRow, CatalogueError> {
    Ok(HostRow {
        host: HostId::from_bytes(row.bytes("host")?),
        name: row.text("name")?,
        enrolled: row.time("enrolled")?,
        removed: row.int("removed")? != 0,
    })
}

fn volume_row(row: &Columns<'_, '_>) -> Result<VolumeRow, CatalogueError> {
    let block = |name| u32::try_from(row.int(name)?).map_err(damaged);
    Ok(VolumeRow {
        volume: VolumeId::from_bytes(row.bytes("volume")?),
        name: row.name("name")?,
        host: HostId::from_bytes(row.bytes("host")?),
        size: VolumeSize::new(row.unsigned("size")?).map_err(damaged)?,
        blocks: BlockSizes::new(block("logical")?, block("physical")?).map_err(damaged)?,
        point_interval_ms: row.unsigned("point_interval_ms")?,
        unprotected: row.int("unprotected")? != 0,
        policy: row.text("policy")?,
        points_upto: row.lsn("points_upto")?,
    })
}

fn point_row(row: &Columns<'_, '_>) -> Result<PointRow, CatalogueError> {
    let kind = match row.text("kind")?.as_str() {
        "crash" => PointKind::Crash,
        "app" => PointKind::App,
        "group" => PointKind::Group,
        other => return Err(damaged(format!("kind of point {other}"))),
    };
    Ok(PointRow {
        point: PointId::new(row.unsigned("point")?),
        volume: VolumeId::from_bytes(row.bytes("volume")?),
        at: NewPoint {
            lsn: row.lsn("lsn")?,
            time: row.time("time")?,
            kind,
            name: row.text("name")?,
            marker: MarkerId::from_bytes(row.bytes("marker")?),
        },
        pinned: row.int("pinned")? != 0,
        recorded: Age(row.unsigned("recorded")?),
    })
}

fn view_row(row: &Columns<'_, '_>) -> Result<ViewRow, CatalogueError> {
    let point: Option<i64> = row.0.get("point")?;
    let path =
        |name| Ok::<_, CatalogueError>(row.0.get::<_, Option<String>>(name)?.map(PathBuf::from));
    let why: Option<String> = row.0.get("flatten_why")?;
    let ended = why.map(|why| Ok::<_, CatalogueError>((row.0.get("flatten_code")?, why)));
    let flatten = path("flatten_to")?.map(|to| {
        Ok::<_, CatalogueError>(FlattenRow {
            to,
            rate: row.unsigned("flatten_rate")?,
            force: row.int("flatten_force")? != 0,
            ended: ended.transpose()?,
        })
    });
    Ok(ViewRow {
        view: ViewId::from_bytes(row.bytes("view")?),
        volume: VolumeId::from_bytes(row.bytes("volume")?),
        lsn: row.lsn("lsn")?,
        opened: row.time("opened")?,
        open_micros: row.unsigned("open_micros")?,
        time: row.time("time")?,
        point: point.map(|n| u64::try_from(n).map(PointId::new)).transpose().map_err(damaged)?,
        size: VolumeSize::new(row.unsigned("size")?).map_err(damaged)?,
        export: row.name("export")?,
        read_only: row.int("read_only")? != 0,
        scratch_bytes: row.unsigned("scratch_bytes")?,
        tls_address: row.0.get("tls_address")?,
        device: path("device")?,
        device_lost: row.0.get("device_lost")?,
        image: path("image")?,
        flatten: flatten.transpose()?,
    })
}

fn event_row(row: &Columns<'_, '_>) -> Result<EventRow, CatalogueError> {
    let volume: Option<String> = row.0.get("volume")?;
    Ok(EventRow {
        time: row.time("time")?,
        code: u16::try_from(row.int("code")?).map_err(damaged)?,
        volume: volume.map(|name| VolumeName::new(&name)).transpose().map_err(damaged)?,
        text: row.text("text")?,
    })
}

/// SQLite's way to say "no limit".
fn sql_limit(limit: u32) -> i64 {
    if limit == 0 { -1 } else { i64::from(limit) }
}

impl SqliteCatalogue {
    fn meta(&self, key: &str) -> Result<Option<i64>, CatalogueError> {
        let sql = "SELECT value FROM meta WHERE key = ?";
        Ok(self.db.prepare_cached(sql)?.query_row([key], |row| row.get(0)).optional()?)
    }

    fn rows<T>(
        &self,
        sql: &str,
        with: impl rusqlite::Params,
        read: fn(&Columns<'_, '_>) -> Result<T, CatalogueError>,
    ) -> Result<Vec<T>, CatalogueError> {
        let mut statement = self.db.prepare_cached(sql)?;
        let mut rows = statement.query(with)?;
        let mut all = Vec::new();
        while let Some(row) = rows.next()? {
            all.push(read(&Columns(row))?);
        }
        Ok(all)
    }
}

impl Catalogue for SqliteCatalogue {
    fn put_host(&mut self, host: &HostRow) -> Result<(), CatalogueError> {
        self.db.execute(
            "INSERT OR REPLACE INTO hosts (host, name, enrolled, removed) VALUES (?, ?, ?, ?)",
            params![host.host.to_bytes(), host.name, host.enrolled.nanos(), host.removed],
        )?;
        Ok(())
    }

    fn host(&self, host: HostId) -> Result<Option<HostRow>, CatalogueError> {
        let sql = "SELECT * FROM hosts WHERE host = ?";
        Ok(self.rows(sql, [host.to_bytes()], host_row)?.pop())
    }

    fn hosts(&self) -> Result<Vec<HostRow>, CatalogueError> {
        self.rows("SELECT * FROM hosts ORDER BY name", [], host_row)
    }

    fn put_token(
        &mut self,
        hash: [u8; 32],
        host_name: &str,
        expires: WallTime,
    ) -> Result<(), CatalogueError> {
        self.db.execute(
            "INSERT INTO tokens (hash, host_name, expires) VALUES (?, ?, ?)",
            params![hash, host_name, expires.nanos()],
        )?;
        Ok(())
    }

    fn take_token(
        &mut self,
        hash: [u8; 32],
        now: WallTime,
    ) -> Result<Option<String>, CatalogueError> {
        let step = self.db.transaction()?;
        step.execute("DELETE FROM tokens WHERE expires < ?", [now.nanos()])?;
        let mut found = None;
        {
            // Every hash is compared, each in constant time; the database compares none.
            let mut all = step.prepare("SELECT hash, host_name FROM tokens")?;
            let mut rows = all.query([])?;
            while let Some(row) = rows.next()? {
                let (kept, name): (Vec<u8>, String) = (row.get(0)?, row.get(1)?);
                if aws_lc_rs::constant_time::verify_slices_are_equal(&kept, &hash).is_ok() {
                    found = Some((kept, name));
                }
            }
        }
        if let Some((kept, _)) = &found {
            step.execute("DELETE FROM tokens WHERE hash = ?", [kept])?;
        }
        step.commit()?;
        Ok(found.map(|(_, name)| name))
    }

    fn put_volume(&mut self, volume: &VolumeRow) -> Result<(), CatalogueError> {
        self.db.execute(
            "INSERT INTO volumes (volume, name, host, size, logical, physical,
               point_interval_ms, unprotected, points_upto, policy)
             VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
             ON CONFLICT (volume) DO UPDATE SET name = excluded.name, size = excluded.size,
               logical = excluded.logical, physical = excluded.physical,
               point_interval_ms = excluded.point_interval_ms,
               unprotected = excluded.unprotected, policy = excluded.policy",
            params![
                volume.volume.to_bytes(),
                volume.name.as_str(),
                volume.host.to_bytes(),
                signed(volume.size.get())?,
                volume.blocks.logical(),
                volume.blocks.physical(),
                signed(volume.point_interval_ms)?,
                volume.unprotected,
                lsn_bytes(volume.points_upto),
                volume.policy,
            ],
        )?;
        Ok(())
    }

    fn volumes(&self) -> Result<Vec<VolumeRow>, CatalogueError> {
        self.rows("SELECT * FROM volumes ORDER BY name", [], volume_row)
    }

    fn add_points(
        &mut self,
        volume: VolumeId,
        points: &[NewPoint],
        upto: Lsn,
        now: Age,
    ) -> Result<(), CatalogueError> {
        let step = self.db.transaction()?;
        for point in points {
            step.prepare_cached(
                "INSERT OR IGNORE INTO points (volume, lsn, time, kind, name, marker, pinned,
                   recorded) VALUES (?, ?, ?, ?, ?, ?, 0, ?)",
            )?
            .execute(params![
                volume.to_bytes(),
                lsn_bytes(point.lsn),
                point.time.nanos(),
                point.kind.as_str(),
                point.name,
                point.marker.to_bytes(),
                signed(now.0)?,
            ])?;
        }
        step.execute(
            "UPDATE volumes SET points_upto = ?2 WHERE volume = ?1 AND points_upto < ?2",
            params![volume.to_bytes(), lsn_bytes(upto)],
        )?;
        step.commit()?;
        Ok(())
    }

    fn points(
        &self,
        volume: VolumeId,
        before: Option<Lsn>,
        limit: u32,
    ) -> Result<Vec<PointRow>, CatalogueError> {
        // A blob sorts after its own beginning: 17 bytes of ones lie after every place.
        let before = before.map_or(vec![0xff; 17], |lsn| lsn_bytes(lsn).to_vec());
        let sql = "SELECT * FROM points WHERE volume = ? AND lsn < ? ORDER BY lsn DESC LIMIT ?";
        self.rows(sql, params![volume.to_bytes(), before, sql_limit(limit)], point_row)
    }

    fn find_point(
        &self,
        volume: VolumeId,
        wanted: &Wanted,
    ) -> Result<Option<PointRow>, CatalogueError> {
        let (condition, value): (&str, Box<dyn rusqlite::ToSql>) = match wanted {
            Wanted::Newest => ("?2 = 0", Box::new(0)),
            Wanted::OfKind(kind) => ("kind = ?2", Box::new(kind.as_str())),
            Wanted::Numbered(point) => ("point = ?2", Box::new(signed(point.get())?)),
            Wanted::Named(name) => ("name = ?2", Box::new(name.clone())),
            Wanted::At(lsn) => ("lsn = ?2", Box::new(lsn_bytes(*lsn))),
        };
        let sql = format!(
            "SELECT * FROM points WHERE volume = ?1 AND {condition} ORDER BY lsn DESC LIMIT 1"
        );
        Ok(self.rows(&sql, params![volume.to_bytes(), value], point_row)?.pop())
    }

    fn point_summary(&self, volume: VolumeId) -> Result<PointSummary, CatalogueError> {
        let end = |order: &str| -> Result<Option<WallTime>, CatalogueError> {
            let sql =
                format!("SELECT time FROM points WHERE volume = ? ORDER BY lsn {order} LIMIT 1");
            let mut statement = self.db.prepare_cached(&sql)?;
            let time = statement.query_row([volume.to_bytes()], |row| row.get(0)).optional()?;
            Ok(time.map(WallTime::from_nanos))
        };
        let count: i64 = self
            .db
            .prepare_cached("SELECT count(*) FROM points WHERE volume = ?")?
            .query_row([volume.to_bytes()], |row| row.get(0))?;
        let count = u64::try_from(count).map_err(damaged)?;
        Ok(PointSummary { count, newest: end("DESC")?, oldest: end("ASC")? })
    }

    fn drop_points(&mut self, points: &[PointId]) -> Result<(), CatalogueError> {
        let step = self.db.transaction()?;
        for point in points {
            step.prepare_cached("DELETE FROM points WHERE point = ?")?
                .execute([signed(point.get())?])?;
        }
        step.commit()?;
        Ok(())
    }

    fn forget_points_after(
        &mut self,
        volume: VolumeId,
        durable: Lsn,
    ) -> Result<usize, CatalogueError> {
        let step = self.db.transaction()?;
        let which = params![volume.to_bytes(), lsn_bytes(durable)];
        let gone = step.execute("DELETE FROM points WHERE volume = ?1 AND lsn > ?2", which)?;
        step.execute(
            "UPDATE volumes SET points_upto = ?2 WHERE volume = ?1 AND points_upto > ?2",
            which,
        )?;
        step.commit()?;
        Ok(gone)
    }

    fn add_point_note(
        &mut self,
        volume: VolumeId,
        lsn: Lsn,
        problem: &Problem,
    ) -> Result<(), CatalogueError> {
        let step = self.db.transaction()?;
        step.execute(
            "INSERT INTO point_notes (volume, lsn, problem) VALUES (?, ?, ?)",
            params![
                volume.to_bytes(),
                lsn_bytes(lsn),
                serde_json::to_string(problem).map_err(damaged)?
            ],
        )?;
        let oldest = step.last_insert_rowid() - MAX_NOTES;
        step.execute("DELETE FROM point_notes WHERE number <= ?", [oldest])?;
        step.commit()?;
        Ok(())
    }

    fn point_note(&self, volume: VolumeId, lsn: Lsn) -> Result<Option<Problem>, CatalogueError> {
        let sql = "SELECT problem FROM point_notes WHERE volume = ? AND lsn = ?
            ORDER BY number LIMIT 1";
        let which = params![volume.to_bytes(), lsn_bytes(lsn)];
        let text: Option<String> =
            self.db.prepare_cached(sql)?.query_row(which, |row| row.get(0)).optional()?;
        text.map(|text| serde_json::from_str(&text)).transpose().map_err(damaged)
    }

    fn put_view(&mut self, view: &ViewRow) -> Result<(), CatalogueError> {
        let sql = "INSERT INTO views (view, volume, lsn, opened, open_micros, time, point, size,
               export, read_only, scratch_bytes, tls_address, device, device_lost, image,
               flatten_to, flatten_rate, flatten_force, flatten_code, flatten_why)
             VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
             ON CONFLICT (view) DO UPDATE SET tls_address = excluded.tls_address,
               device = excluded.device, device_lost = excluded.device_lost,
               image = excluded.image, flatten_to = excluded.flatten_to,
               flatten_rate = excluded.flatten_rate, flatten_force = excluded.flatten_force,
               flatten_code = excluded.flatten_code, flatten_why = excluded.flatten_why";
        let text = |path: &PathBuf| path.display().to_string();
        let flatten = view.flatten.as_ref();
        let ended = flatten.and_then(|flatten| flatten.ended.as_ref());
        self.db.execute(
            sql,
            params![
                view.view.to_bytes(),
                view.volume.to_bytes(),
                lsn_bytes(view.lsn),
                view.opened.nanos(),
                signed(view.open_micros)?,
                view.time.nanos(),
                view.point.map(|point| signed(point.get())).transpose()?,
                signed(view.size.get())?,
                view.export.as_str(),
                view.read_only,
                signed(view.scratch_bytes)?,
                view.tls_address,
                view.device.as_ref().map(text),
                view.device_lost,
                view.image.as_ref().map(text),
                flatten.map(|flatten| text(&flatten.to)),
                flatten.map(|flatten| signed(flatten.rate)).transpose()?,
                flatten.map(|flatten| flatten.force),
                ended.map(|(code, _)| code),
                ended.map(|(_, why)| why),
            ],
        )?;
        Ok(())
    }

    fn open_views(&self) -> Result<Vec<ViewRow>, CatalogueError> {
        // Those of version 2 have no size.
        let sql = "SELECT * FROM views WHERE closed IS NULL AND size IS NOT NULL ORDER BY opened";
        self.rows(sql, [], view_row)
    }

    fn is_closed(&self, view: ViewId) -> Result<Option<bool>, CatalogueError> {
        let sql = "SELECT closed IS NOT NULL OR size IS NULL FROM views WHERE view = ?";
        let mut statement = self.db.prepare_cached(sql)?;
        Ok(statement.query_row([view.to_bytes()], |row| row.get(0)).optional()?)
    }

    fn close_view(&mut self, view: ViewId, at: WallTime, note: &str) -> Result<(), CatalogueError> {
        self.db.execute(
            "UPDATE views SET closed = ?, note = ? WHERE view = ?",
            params![at.nanos(), note, view.to_bytes()],
        )?;
        Ok(())
    }

    fn last_drill(&self, volume: VolumeId) -> Result<Option<WallTime>, CatalogueError> {
        let sql = "SELECT max(closed) FROM views WHERE volume = ?";
        let closed: Option<i64> =
            self.db.prepare_cached(sql)?.query_row([volume.to_bytes()], |row| row.get(0))?;
        Ok(closed.map(WallTime::from_nanos))
    }

    fn last_scrub(&self, volume: VolumeId) -> Result<Option<Scrub>, CatalogueError> {
        let at = self.meta(&format!("scrub {volume}"))?.map(WallTime::from_nanos);
        let found = self.meta(&format!("scrub {volume} found"))?.unwrap_or(0);
        let found = u64::try_from(found).map_err(damaged)?;
        Ok(at.map(|at| Scrub { at, found }))
    }

    fn set_last_scrub(&mut self, volume: VolumeId, scrub: Scrub) -> Result<(), CatalogueError> {
        let step = self.db.transaction()?;
        let set = "INSERT OR REPLACE INTO meta (key, value) VALUES (?, ?)";
        step.execute(set, params![format!("scrub {volume}"), scrub.at.nanos()])?;
        step.execute(set, params![format!("scrub {volume} found"), signed(scrub.found)?])?;
        step.commit()?;
        Ok(())
    }

    fn add_event(&mut self, event: &EventRow) -> Result<(), CatalogueError> {
        let step = self.db.transaction()?;
        step.execute(
            "INSERT INTO events (time, code, volume, text) VALUES (?, ?, ?, ?)",
            params![
                event.time.nanos(),
                event.code,
                event.volume.as_ref().map(VolumeName::as_str),
                event.text
            ],
        )?;
        let oldest = step.last_insert_rowid() - MAX_EVENTS;
        step.execute("DELETE FROM events WHERE event <= ?", [oldest])?;
        step.commit()?;
        Ok(())
    }

    fn events(&self, limit: u32) -> Result<Vec<EventRow>, CatalogueError> {
        let sql = "SELECT * FROM events ORDER BY event DESC LIMIT ?";
        self.rows(sql, [sql_limit(limit)], event_row)
    }

    fn age(&self) -> Result<Age, CatalogueError> {
        let value = self.meta("age_ms")?;
        Ok(Age(u64::try_from(value.unwrap_or(0)).map_err(damaged)?))
    }

    fn set_age(&mut self, age: Age) -> Result<(), CatalogueError> {
        self.db.execute(
            "INSERT OR REPLACE INTO meta (key, value) VALUES ('age_ms', ?)",
            [signed(age.0)?],
        )?;
        Ok(())
    }
}
