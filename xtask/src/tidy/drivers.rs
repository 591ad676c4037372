//! Driver folders are alike, so that who knows one knows them all.

use std::path::Path;

/// The files of a driver, in the order in which they are read. All but the first two may be absent.
const FILES: &[&str] = &[
    "mod.rs",
    "README.md",
    "config.rs",
    "client.rs",
    "wire.rs",
    "cut.rs",
    "drain.rs",
    "restore.rs",
    "tests.rs",
    // What stands at the top of every point, where it is more than a line.
    "HOW-TO-RESTORE.txt",
];

/// Further files of single drivers, each with its reason.
const EXTRA: &[(&str, &str)] = &[
    // Key escaping is a format of its own, property-tested apart.
    ("objects", "keys.rs"),
    // What a cut shows where nothing holds it; judges lists and asks no store.
    ("objects", "sieve.rs"),
    // Listings of any length, sorted on disk.
    ("objects", "spool.rs"),
    // A client of our own for S3, another for the rest: client.rs is the directory and the interface.
    ("objects", "bucket"),
    // The spool of the walk before the cut, merge-joined in the drain.
    ("files", "spool.rs"),
    // Walk and judgement serve cut, drain and references alike.
    ("files", "walk.rs"),
    // What file systems keep: btrfs, LVM, reflink.
    ("files", "snapshot.rs"),
    // All databases are put in place, or none.
    ("sqlite", "swap.rs"),
    // The protocol's own I/O, and what it runs over.
    ("postgres", "endpoint.rs"),
    ("postgres", "session"),
    ("postgres", "session.rs"),
    ("postgres", "tls.rs"),
    // SQL over the catalogs, for every phase.
    ("postgres", "catalog.rs"),
    // Names and descriptions in the tree, for both ways.
    ("postgres", "layout.rs"),
    // Sessions that show the view, and the streams that take them.
    ("postgres", "pool.rs"),
    ("postgres", "copy.rs"),
    // The server's own programs, and what they are asked for.
    ("postgres", "tools.rs"),
    ("postgres", "dump.rs"),
    // What a backup would meet; long, because each finding comes with its remedy.
    ("postgres", "probe.rs"),
    // Which files of the parent still hold; reasoned about in a decision of its own.
    ("postgres", "extents.rs"),
    // Tests: each makes a server misbehave.
    ("postgres", "faults.rs"),
    // The operator's own SQL.
    ("postgres", "edges.rs"),
    // The way back has a page for each of its steps; all databases get their names, or none.
    ("postgres", "restore"),
    ("postgres", "swap.rs"),
    ("postgres", "verify.rs"),
    // The stamp opens what a restore left closed.
    ("postgres", "stamp.rs"),
    // A schema that uses every feature, and the tests that carry it there and back.
    ("postgres", "testdata"),
    ("postgres", "tests"),
    // Each side of the replication protocol: we as a replica, and as a master.
    ("redis", "replica.rs"),
    ("redis", "image.rs"),
    ("redis", "master.rs"),
    // What a target bears while it follows us; what it was before, and how it becomes that again.
    ("redis", "loan.rs"),
    ("redis", "kept.rs"),
    ("redis", "users.rs"),
    // What servers say of themselves, and which of them hold which slots.
    ("redis", "server.rs"),
    // What the server sends waits here for the repository, in memory and on disk.
    ("redis", "spool.rs"),
    // The image's format, and the packed forms and streams within it.
    ("redis", "rdb.rs"),
    ("redis", "packed.rs"),
    ("redis", "streams.rs"),
    // Where keys stand in commands; the way back key by key; into plain files.
    ("redis", "commands.rs"),
    ("redis", "keys.rs"),
    ("redis", "folder.rs"),
    ("redis", "part.rs"),
    // Times of expiry, changed in image and commands on the way in.
    ("redis", "expiry.rs"),
    // Comparison in bounded memory.
    ("redis", "verify.rs"),
    // References follow the commands behind the image.
    ("redis", "edges.rs"),
    ("redis", "effects.rs"),
];

/// Complains about missing and about foreign files, and about drivers without registry line.
pub fn check(root: &Path) -> Result<Vec<String>, String> {
    let home = root.join("crates/drivers/src");
    let registry =
        std::fs::read_to_string(home.join("lib.rs")).map_err(|error| format!("drivers/src/lib.rs: {error}"))?;
    let mut complaints = Vec::new();
    for entry in std::fs::read_dir(&home).map_err(|error| format!("crates/drivers/src: {error}"))? {
        let entry = entry.map_err(|error| format!("crates/drivers/src: {error}"))?;
        if !entry.path().is_dir() {
            continue;
        }
        let driver = entry.file_name().to_string_lossy().into_owned();
        complaints.extend(folder(&entry.path(), &driver)?);
        if !registry.contains(&format!("{driver}::")) {
            complaints.push(format!("driver `{driver}` has no line in the registry (crates/drivers/src/lib.rs)"));
        }
    }
    Ok(complaints)
}

fn folder(path: &Path, driver: &str) -> Result<Vec<String>, String> {
    let mut names = Vec::new();
    for entry in std::fs::read_dir(path).map_err(|error| format!("{}: {error}", path.display()))? {
        let entry = entry.map_err(|error| format!("{}: {error}", path.display()))?;
        names.push(entry.file_name().to_string_lossy().into_owned());
    }
    let mut complaints = Vec::new();
    for required in &FILES[..2] {
        if !names.iter().any(|name| name == required) {
            complaints.push(format!("driver `{driver}` lacks {required}"));
        }
    }
    for name in &names {
        let known = FILES.contains(&name.as_str()) || EXTRA.contains(&(driver, name.as_str()));
        if !known {
            complaints.push(format!("driver `{driver}`: `{name}` is no file of a driver (xtask/src/tidy/drivers.rs)"));
        }
    }
    Ok(complaints)
}
