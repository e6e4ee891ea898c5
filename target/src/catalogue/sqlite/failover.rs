//! Failovers and jobs in SQLite.

use farshore_extent::{Generation, VolumeId, WallTime};
use farshore_protocol::failover::{JobId, JobKind, JobState};
use rusqlite::params;
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::super::CatalogueError;
use super::super::failover::{Failovers, JobRow};
use super::{Columns, SqliteCatalogue, damaged, signed, sql_limit};
use crate::failover::pair::Pair;

/// Jobs kept; the oldest that have ended go.
const MAX_JOBS: i64 = 1000;

/// For new catalogues and for those of before.
pub(super) const SCHEMA: &str = "
CREATE TABLE failovers (
  volume BLOB PRIMARY KEY, phase TEXT NOT NULL, generation INTEGER NOT NULL,
  admits INTEGER NOT NULL, open TEXT, next TEXT, since INTEGER NOT NULL) STRICT;
CREATE TABLE jobs (
  job INTEGER PRIMARY KEY AUTOINCREMENT, kind TEXT NOT NULL, volume BLOB NOT NULL,
  name TEXT NOT NULL, state TEXT NOT NULL, step TEXT NOT NULL, begun INTEGER NOT NULL,
  ended INTEGER, result TEXT NOT NULL, problem TEXT) STRICT;
";

/// A value of the domain as its JSON text; words without their quotes.
fn text(value: &impl Serialize) -> Result<String, CatalogueError> {
    match serde_json::to_value(value).map_err(damaged)? {
        serde_json::Value::String(word) => Ok(word),
        other => Ok(other.to_string()),
    }
}

fn word<T: DeserializeOwned>(text: String) -> Result<T, CatalogueError> {
    serde_json::from_value(serde_json::Value::String(text)).map_err(damaged)
}

fn maybe<T: DeserializeOwned>(text: Option<String>) -> Result<Option<T>, CatalogueError> {
    text.map(|text| serde_json::from_str(&text).map_err(damaged)).transpose()
}

fn pair_row(row: &Columns<'_, '_>) -> Result<Pair, CatalogueError> {
    Ok(Pair {
        phase: row.text("phase")?.parse().map_err(CatalogueError::Damaged)?,
        generation: Generation::new(row.unsigned("generation")?),
        admits: Generation::new(row.unsigned("admits")?),
        open: maybe(row.0.get("open")?)?,
        next: maybe(row.0.get("next")?)?,
        since: row.time("since")?,
    })
}

fn job_row(row: &Columns<'_, '_>) -> Result<JobRow, CatalogueError> {
    let ended: Option<i64> = row.0.get("ended")?;
    Ok(JobRow {
        job: JobId::new(row.unsigned("job")?),
        kind: word::<JobKind>(row.text("kind")?)?,
        volume: VolumeId::from_bytes(row.bytes("volume")?),
        name: row.name("name")?,
        state: word::<JobState>(row.text("state")?)?,
        step: row.text("step")?,
        begun: row.time("begun")?,
        ended: ended.map(WallTime::from_nanos),
        result: row.text("result")?,
        problem: maybe(row.0.get("problem")?)?,
    })
}

impl Failovers for SqliteCatalogue {
    fn put_failover(
        &mut self,
        volume: VolumeId,
        pair: &Pair,
        job: &JobRow,
    ) -> Result<JobId, CatalogueError> {
        let json = |value: &Option<_>| value.as_ref().map(text).transpose();
        let step = self.db.transaction()?;
        step.execute(
            "INSERT OR REPLACE INTO failovers
               (volume, phase, generation, admits, open, next, since)
             VALUES (?, ?, ?, ?, ?, ?, ?)",
            params![
                volume.to_bytes(),
                pair.phase.as_str(),
                signed(pair.generation.get())?,
                signed(pair.admits.get())?,
                json(&pair.open)?,
                json(&pair.next)?,
                pair.since.nanos(),
            ],
        )?;
        let number = (job.job != JobId::new(0)).then_some(signed(job.job.get())?);
        step.execute(
            "INSERT OR REPLACE INTO jobs
               (job, kind, volume, name, state, step, begun, ended, result, problem)
             VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            params![
                number,
                job.kind.as_str(),
                volume.to_bytes(),
                job.name.as_str(),
                job.state.as_str(),
                job.step,
                job.begun.nanos(),
                job.ended.map(WallTime::nanos),
                job.result,
                job.problem.as_ref().map(text).transpose()?,
            ],
        )?;
        let number = number.unwrap_or_else(|| step.last_insert_rowid());
        step.execute(
            "DELETE FROM jobs WHERE job <= ? AND ended IS NOT NULL",
            [number.saturating_sub(MAX_JOBS)],
        )?;
        step.commit()?;
        Ok(JobId::new(u64::try_from(number).map_err(damaged)?))
    }

    fn failover(&self, volume: VolumeId) -> Result<Option<Pair>, CatalogueError> {
        let sql = "SELECT * FROM failovers WHERE volume = ?";
        Ok(self.rows(sql, [volume.to_bytes()], pair_row)?.pop())
    }

    fn jobs(&self, limit: u32) -> Result<Vec<JobRow>, CatalogueError> {
        let sql = "SELECT * FROM jobs ORDER BY job DESC LIMIT ?";
        self.rows(sql, [sql_limit(limit)], job_row)
    }

    fn job(&self, job: JobId) -> Result<Option<JobRow>, CatalogueError> {
        Ok(self.rows("SELECT * FROM jobs WHERE job = ?", [signed(job.get())?], job_row)?.pop())
    }
}
