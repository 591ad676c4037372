//! Bulk: rows that are there and never change, so that a measurement can choose the size of data.

use crate::settings::Settings;
use crate::stores;
use crate::{Attempted, Result};

/// Rows of one statement.
const ROWS_PER_STATEMENT: u64 = 20_000;
/// Bytes that a row takes on disk, about.
const ROW_BYTES: u64 = 540;

/// Adds about `megabytes` MB (10⁶ bytes) of rows to the database.
pub async fn fill(settings: &Settings, megabytes: u64) -> Result<u64> {
    let client = stores::database(&settings.postgres).await?;
    let table = "CREATE TABLE IF NOT EXISTS history (id bigint PRIMARY KEY, run uuid, at timestamptz, loss float8, \
                 payload jsonb, note text)";
    client.batch_execute(table).await.attempted("make the table")?;
    let rows = megabytes * 1_000_000 / ROW_BYTES;
    let begin: i64 =
        client.query_one("SELECT coalesce(max(id), 0) FROM history", &[]).await.attempted("count the rows")?.get(0);
    let insert = "INSERT INTO history SELECT i, gen_random_uuid(), now(), random(), \
                  jsonb_build_object('step', i, 'host', 'worker-' || i % 64, 'digest', md5(i::text) || md5((i + 1)::text)), \
                  repeat(md5((i * 7)::text) || ' ', 10) FROM generate_series($1::bigint, $2::bigint) AS i";
    let mut next = begin + 1;
    let last = begin + rows.cast_signed();
    while next <= last {
        let until = (next + ROWS_PER_STATEMENT.cast_signed() - 1).min(last);
        client.execute(insert, &[&next, &until]).await.attempted("fill the table")?;
        next = until + 1;
    }
    client.batch_execute("VACUUM (ANALYZE) history").await.attempted("vacuum the table")?;
    let bytes = "SELECT sum(pg_total_relation_size(oid))::bigint FROM pg_class WHERE relkind = 'r' AND relnamespace = \
                 'public'::regnamespace";
    let bytes: i64 = client.query_one(bytes, &[]).await.attempted("measure the tables")?.get(0);
    Ok(bytes.unsigned_abs())
}
