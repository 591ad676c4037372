//! The postgres bench: backups and restores of a real server, beside the server's own tools.
//!
//! Two inputs: about 1 GB of rows as applications have them (events in JSON, text, numbers and times, a
//! wide table, 200 small ones), and pgbench's, which is mostly padding. The server lies in the bench's
//! folder, like everything else.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use stillpoint_testkit::servers::{POSTGRES_PASSWORD, Postgres};

use super::BenchArgs;
use super::measure::{median, run as measure};
use super::table::Row;

/// Figures by case and label, one value a round.
type Figures = BTreeMap<(&'static str, &'static str), Vec<f64>>;

/// Where the server's programs are looked for: a rig's, then Debian's.
const RIGS: [&str; 3] =
    ["STILLPOINT_RIG_POSTGRES_18_BIN", "STILLPOINT_RIG_POSTGRES_16_BIN", "STILLPOINT_RIG_POSTGRES_BIN"];
const DEBIAN: &str = "/usr/lib/postgresql/15/bin";

/// What is compared: case, ours, peer, whose name is shown, and the goal for ours / peer.
const COMPARISONS: &[(&str, &str, &str, f64)] = &[
    ("pg rows", "backup", "pg_dump -Fd -j2", 0.5),
    ("pg rows", "backup", "COPY to /dev/null, 2 connections", 2.0),
    ("pg rows", "stored_mb", "pg_dump | zstd -2 mb", 1.0),
    ("pg rows", "1 % changed", "backup", 0.5),
    ("pg rows", "restore", "pg_restore -j2", 1.0 / 1.3),
    ("pg pgbench", "backup", "pg_dump -Fd -j2", 1.0 / 1.3),
    ("pg pgbench", "backup", "COPY to /dev/null, 2 connections", 2.0),
    ("pg pgbench", "stored_mb", "pg_dump | zstd -2 mb", 1.0),
    ("pg pgbench", "restore", "pg_restore -j2", 1.0 / 1.3),
];

struct Bench<'a> {
    args: &'a BenchArgs,
    ours: PathBuf,
    bin: PathBuf,
    server: Postgres,
    figures: Figures,
}

/// Starts a server, fills it, runs all rounds, and returns the rows.
pub fn run(root: &Path, args: &BenchArgs) -> Result<Vec<Row>, String> {
    let ours = super::files::build(root)?;
    std::fs::create_dir_all(&args.dir).map_err(|error| error.to_string())?;
    let bin = RIGS.iter().find_map(std::env::var_os).map_or_else(|| PathBuf::from(DEBIAN), PathBuf::from);
    let settings = ["shared_buffers=256MB", "max_wal_size=8GB", "checkpoint_timeout=1h", "autovacuum=off"];
    let server = Postgres::start(&bin, &settings).map_err(|error| error.to_string())?;
    let mut bench = Bench { args, ours, bin, server, figures: Figures::new() };
    let outcome = bench.all();
    let rows = bench.rows();
    drop(bench);
    super::files::remove(&args.dir)?;
    outcome?;
    Ok(rows)
}

impl Bench<'_> {
    fn all(&mut self) -> Result<(), String> {
        if self.wants("pg rows") {
            self.sql("postgres", "CREATE DATABASE rows")?;
            self.fill()?;
            self.rounds("pg rows", "rows")?;
        }
        if self.wants("pg pgbench") {
            let scale = ((50.0 * self.args.scale) as u64).max(1).to_string();
            self.sql("postgres", "CREATE DATABASE pgbench")?;
            let mut command = self.program("pgbench");
            measure(command.args(["-i", "-q", "-s", &scale, "-d", &self.server.url("pgbench")]))?;
            self.rounds("pg pgbench", "pgbench")?;
        }
        Ok(())
    }

    fn wants(&self, case: &str) -> bool {
        self.args.cases.is_empty() || self.args.cases.iter().any(|wanted| wanted == case)
    }

    fn program(&self, name: &str) -> Command {
        Command::new(self.bin.join(name))
    }

    fn sql(&self, database: &str, statements: &str) -> Result<String, String> {
        self.server.sql(database, statements).map_err(|error| error.to_string())
    }

    fn note(&mut self, case: &'static str, label: &'static str, value: f64) {
        println!("  {case:<16} {label:<34} {value:>10.3}");
        self.figures.entry((case, label)).or_default().push(value);
    }

    /// Rows as applications have them, about 1 GB at scale 1.
    fn fill(&self) -> Result<(), String> {
        let count = |rows: f64| (rows * self.args.scale).max(10.0) as u64;
        let statements = [
            format!(
                "SELECT setseed(0.5); CREATE TABLE events (id bigint PRIMARY KEY, at timestamptz NOT NULL, tenant int, \
                 kind text, body jsonb); INSERT INTO events SELECT n, '2026-01-01'::timestamptz + n * interval '1 s', \
                 (random() * 500)::int, (ARRAY['login', 'predict', 'train', 'upload', 'delete'])[1 + (random() * 4)::int], \
                 jsonb_build_object('user', md5((random() * 20000)::int::text), 'latency_ms', round((random() * 900)::numeric, 3), \
                 'path', '/api/v1/models/' || (random() * 5000)::int || '/versions/' || (random() * 40)::int, \
                 'status', (ARRAY[200, 200, 200, 201, 404, 500])[1 + (random() * 5)::int], 'trace', md5(random()::text), \
                 'flags', jsonb_build_array(random() > 0.5, random() > 0.9)) FROM generate_series(1, {}) n",
                count(1_400_000.0)
            ),
            format!(
                "CREATE TABLE documents (id int PRIMARY KEY, title text, words text); INSERT INTO documents \
                 SELECT n, 'document ' || n, (SELECT string_agg(w, ' ') FROM (SELECT \
                 (ARRAY['model', 'data', 'feature', 'drift', 'train', 'the', 'of', 'and', 'batch', 'score', 'label', 'run', \
                 'store', 'point', 'cut', 'view', 'table', 'row', 'index', 'of'])[1 + (random() * 19)::int] || \
                 CASE WHEN random() < 0.1 THEN (random() * 100000)::int::text ELSE '' END AS w \
                 FROM generate_series(1, 200 + n % 100)) x) FROM generate_series(1, {}) n",
                count(100_000.0)
            ),
            format!(
                "CREATE TABLE metrics (series int, at timestamp, value float8, low float8, high float8, n bigint); \
                 INSERT INTO metrics SELECT n % 1000, '2026-01-01'::timestamp + n * interval '100 ms', random() * 1e6, \
                 random(), random() * 10, (random() * 1e12)::bigint FROM generate_series(1, {}) n; \
                 CREATE INDEX ON metrics (series, at)",
                count(3_000_000.0)
            ),
            format!(
                "CREATE TABLE wide (id int PRIMARY KEY, {}); INSERT INTO wide SELECT n, {} FROM generate_series(1, {}) n",
                (0..60).map(|n| format!("c{n} {}", ["int", "text", "float8"][n % 3])).collect::<Vec<_>>().join(", "),
                (0..60)
                    .map(|n| ["(random() * 1e6)::int", "'value ' || (random() * 1e4)::int", "random()"][n % 3])
                    .collect::<Vec<_>>()
                    .join(", "),
                count(150_000.0)
            ),
        ];
        for statement in statements {
            self.sql("rows", &statement)?;
        }
        for group in 0..20 {
            let tables = (group * 10..group * 10 + 10).map(|n| {
                format!(
                    "CREATE TABLE small_{n} (id int PRIMARY KEY, name text UNIQUE, at timestamptz); \
                     INSERT INTO small_{n} SELECT i, 'name ' || i, now() FROM generate_series(1, 200) i;"
                )
            });
            self.sql("rows", &tables.collect::<String>())?;
        }
        self.sql("rows", "VACUUM ANALYZE").map(drop)
    }

    fn rounds(&mut self, case: &'static str, database: &'static str) -> Result<(), String> {
        for round in 0..self.args.rounds {
            println!("{case}: round {} of {}", round + 1, self.args.rounds);
            self.round(case, database, round)?;
        }
        self.sql("postgres", &format!("DROP DATABASE {database} WITH (FORCE)")).map(drop)
    }

    fn round(&mut self, case: &'static str, database: &'static str, round: usize) -> Result<(), String> {
        let home = self.args.dir.join("home");
        std::fs::create_dir_all(&home).map_err(|error| error.to_string())?;
        self.write_platform(&home, database)?;
        measure(&mut self.stillpoint(&home, &["init"]))?;
        let dump = self.args.dir.join("dump");
        // Each is first in its turn.
        for step in 0..3 {
            match (step + round) % 3 {
                0 => {
                    let run = measure(&mut self.stillpoint(&home, &["backup"]))?;
                    self.note(case, "backup", run.seconds);
                    self.note(case, "peak_mb", run.peak_mb);
                    self.note(case, "stored_mb", super::files::size_mb(&home.join("bucket"))?);
                }
                1 => {
                    let mut command = self.program("pg_dump");
                    command.args(["-Fd", "-j2", "-f"]).arg(&dump).args(["-d", &self.server.url(database)]);
                    let run = measure(&mut command)?;
                    self.note(case, "pg_dump -Fd -j2", run.seconds);
                }
                _ => self.copy_to_nowhere(case, database)?,
            }
        }
        self.compressed(case, database)?;
        self.restores(case, database, &home, &dump, round)?;
        if case == "pg rows" {
            self.change(round)?;
            let before = super::files::size_mb(&home.join("bucket"))?;
            let run = measure(&mut self.stillpoint(&home, &["backup"]))?;
            self.note(case, "1 % changed", run.seconds);
            self.note(case, "new_mb", super::files::size_mb(&home.join("bucket"))? - before);
        }
        super::files::remove(&dump)?;
        super::files::remove(&home)
    }

    /// The floor: the server writes all rows, and nobody does anything with them.
    fn copy_to_nowhere(&mut self, case: &'static str, database: &str) -> Result<(), String> {
        let listed = self.sql(
            database,
            "SELECT format('%I.%I', schemaname, relname) FROM pg_stat_user_tables ORDER BY pg_relation_size(relid) DESC",
        )?;
        let (mut halves, mut sizes) = ([String::new(), String::new()], [0_u64; 2]);
        for table in listed.lines() {
            let size: u64 = self.sql(database, &format!("SELECT pg_table_size('{table}')"))?.parse().unwrap_or(0);
            let to = usize::from(sizes[1] < sizes[0]);
            sizes[to] += size;
            halves[to].push_str(&format!("COPY {table} TO STDOUT;\n"));
        }
        let psql = self.bin.join("psql").display().to_string();
        let url = self.server.url(database);
        let mut script = String::new();
        for (number, half) in halves.iter().enumerate() {
            let path = self.args.dir.join(format!("copy{number}.sql"));
            std::fs::write(&path, half).map_err(|error| error.to_string())?;
            script.push_str(&format!("'{psql}' -Xq -v ON_ERROR_STOP=1 -f '{}' '{url}' > /dev/null & ", path.display()));
        }
        script.push_str("wait");
        let run = measure(Command::new("sh").args(["-c", &script]))?;
        self.note(case, "COPY to /dev/null, 2 connections", run.seconds);
        Ok(())
    }

    fn compressed(&mut self, case: &'static str, database: &str) -> Result<(), String> {
        let path = self.args.dir.join("dump.zst");
        let (program, url) = (self.bin.join("pg_dump").display().to_string(), self.server.url(database));
        let script = format!("'{program}' '{url}' | zstd -2 -q -o '{}' -f", path.display());
        let run = measure(Command::new("sh").args(["-c", &script]))?;
        self.note(case, "pg_dump | zstd -2", run.seconds);
        let bytes = std::fs::metadata(&path).map_err(|error| error.to_string())?.len();
        self.note(case, "pg_dump | zstd -2 mb", bytes as f64 / 1e6);
        std::fs::remove_file(&path).map_err(|error| error.to_string())
    }

    fn restores(
        &mut self,
        case: &'static str,
        database: &str,
        home: &Path,
        dump: &Path,
        round: usize,
    ) -> Result<(), String> {
        for step in 0..2 {
            if (step + round).is_multiple_of(2) {
                let restore = ["restore", "latest", "--into", "copy", "--no-compare"];
                let run = measure(&mut self.stillpoint(home, &restore))?;
                self.note(case, "restore", run.seconds);
                self.sql("postgres", &format!("DROP DATABASE {database}_copy WITH (FORCE)"))?;
            } else {
                self.sql("postgres", &format!("CREATE DATABASE {database}_peer"))?;
                let url = self.server.url(&format!("{database}_peer"));
                let run = measure(self.program("pg_restore").args(["-j2", "-d", &url]).arg(dump))?;
                self.note(case, "pg_restore -j2", run.seconds);
                self.sql("postgres", &format!("DROP DATABASE {database}_peer WITH (FORCE)"))?;
            }
        }
        Ok(())
    }

    /// Changes one row in a hundred, in five places of each large table, as data that came at one time is
    /// changed together.
    fn change(&self, round: usize) -> Result<(), String> {
        let changes = [("events", "tenant = tenant + 1"), ("documents", "title = title || '.'")];
        for (table, change) in changes {
            self.sql(
                "rows",
                &format!(
                    "UPDATE {table} SET {change} FROM (SELECT count(*) AS n FROM {table}) c \
                     WHERE (id + {round} * 1000) % (c.n / 5 + 1) < c.n / 500"
                ),
            )?;
        }
        self.sql(
            "rows",
            "UPDATE metrics SET value = value + 1 FROM (SELECT count(*) / 500 AS n, min(at) AS first FROM metrics) c, \
             generate_series(0, 4) place WHERE at >= first + place * c.n * 95 * interval '100 ms' \
             AND at < first + (place * c.n * 95 + c.n) * interval '100 ms'",
        )
        .map(drop)
    }

    fn stillpoint(&self, home: &Path, arguments: &[&str]) -> Command {
        let mut command = Command::new(&self.ours);
        command.arg("--config").arg(home.join("platform.yaml")).args(arguments).current_dir(home);
        command.env("BENCH_PASSWORD", POSTGRES_PASSWORD).env("XDG_STATE_HOME", home.join("state"));
        command
    }

    fn write_platform(&self, home: &Path, database: &str) -> Result<(), String> {
        let server = format!(
            "host: 127.0.0.1\n{{0}}port: {}\n{{0}}user: postgres\n{{0}}password: env:BENCH_PASSWORD\n{{0}}tools: {}\n",
            self.server.port(),
            self.bin.display()
        );
        let store = server.replace("{0}", "    ");
        let target = server.replace("{0}", "        ");
        let text = format!(
            "apiVersion: stillpoint.dev/v1\nplatform: bench\nenvironment: bench\nbucket:\n  url: {0}/bucket\n  key: \
             file:{0}/bench.key\nstores:\n  data:\n    driver: postgres\n    {store}    databases: [{database}]\n\
             targets:\n  copy:\n    stores:\n      data:\n        {target}        databases: [{database}_copy]\n",
            home.display(),
        );
        std::fs::write(home.join("platform.yaml"), text).map_err(|error| error.to_string())
    }

    fn rows(&self) -> Vec<Row> {
        let value = |case, label| self.figures.get(&(case, label)).map(|values| median(values));
        let mut rows = Vec::new();
        for &(case, ours, peer, goal) in COMPARISONS {
            let (Some(mine), Some(theirs)) = (value(case, ours), value(case, peer)) else { continue };
            let metric = if ours.ends_with("_mb") { ours } else { "seconds" };
            let name = format!("{case} {ours}");
            rows.push(Row::against(&name, metric, mine, (peer, theirs), Some(goal)));
        }
        for (case, label) in self.figures.keys() {
            if matches!(*label, "peak_mb" | "new_mb" | "pg_dump | zstd -2") {
                rows.push(Row::alone(case, label, value(case, label).unwrap_or_default(), None));
            }
        }
        rows
    }
}
